"""`jaxserve compile`: a start after it compiles nothing."""

import re

from few_programs import Precompiled


def test_a_start_after_it_compiles_nothing(few_programs: Precompiled):
    told = re.search(r"jaxserve compile: (\d+) programs compiled, 0 were there already, [\d.]+ s, (\S+)", few_programs.compiled)
    start = few_programs.start
    assert told and start["missed"] == 0 and start["found"] >= 7
    assert int(told[1]) >= start["found"] and told[2] == str(few_programs.folder)
    assert "are to be lowered" in few_programs.logged  # it is not silent for the minutes that it may take
    compiled_by_xla = [name for name in start["files"] if name.startswith("jit_")]
    assert compiled_by_xla and not any(name.startswith("jit_forward") for name in compiled_by_xla)  # they are kept once
    assert len(start["listed"]) == len(start["kept"]) == 2
    for listed, kept in zip(start["listed"], start["kept"].values(), strict=True):
        assert set(listed) == {name for name in kept if not name.startswith("prepared-")}
