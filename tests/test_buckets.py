"""Which compiled shape a batch takes."""

import pytest

from jaxserve.runner.buckets import Bucket, Buckets

LARGE = 16 << 30  # bytes of weights on a device


@pytest.mark.parametrize("platform", ["cpu", "gpu"])
@pytest.mark.parametrize(("max_batch_size", "max_batch_tokens"), [(32, 512), (1, 1), (1, 16), (3, 40), (256, 8192), (100, 100)])
def test_every_legal_batch_has_a_bucket(platform: str, max_batch_size: int, max_batch_tokens: int):
    buckets = Buckets.for_platform(platform, max_batch_size, max_batch_tokens, LARGE)
    for rows in range(1, max_batch_size + 1):
        assert buckets.pick(rows, rows).decode_only
        for tokens in {rows + 1, (rows + max_batch_tokens) // 2, max_batch_tokens} & set(range(rows + 1, max_batch_tokens + 1)):
            bucket = buckets.pick(tokens, rows)
            assert bucket in set(buckets)
            assert not bucket.decode_only and bucket.num_tokens >= tokens and bucket.num_rows >= rows


def test_the_smallest_one_is_taken():
    buckets = Buckets((1, 4), ((64, 4), (16, 4), (16, 2), (64, 2)))
    assert buckets.pick(1, 1) == Bucket(1, 1, True)
    assert buckets.pick(2, 2) == Bucket(4, 4, True)
    assert buckets.pick(5, 2) == Bucket(16, 2, False)
    assert buckets.pick(16, 3) == Bucket(16, 4, False)
    assert buckets.pick(17, 1) == Bucket(64, 2, False)


def test_what_no_bucket_holds_is_refused():
    buckets = Buckets.for_platform("cpu", 4, 64, LARGE)
    for tokens, rows in ((65, 1), (5, 5), (20, 5)):
        with pytest.raises(ValueError, match="no bucket"):
            buckets.pick(tokens, rows)


def test_padding_never_more_than_doubles_a_step():
    buckets = Buckets.for_platform("cpu", 32, 512, LARGE)
    for tokens in range(33, 513):
        assert buckets.pick(tokens, 1).num_tokens < 2 * tokens


def test_a_cpu_compiles_few_programs():
    assert len(list(Buckets.for_platform("cpu", 32, 512, LARGE))) <= 16


def test_padding_of_large_steps_on_a_gpu_is_small():
    buckets = Buckets.for_platform("gpu", 256, 8192, LARGE)
    for tokens in range(257, 8193):
        # Larger ones are cut by the scheduler: test_scheduler.py.
        assert buckets.pick(tokens, 20).num_tokens < (1.26 if tokens <= 1024 else 1.5) * tokens
    for rows in range(65, 257):
        assert buckets.pick(rows, rows).num_tokens < 1.25 * rows
    assert len(list(buckets)) < 41 and buckets.logits == (8, 64, 256)
    for bucket in buckets:  # no shape that a smaller one always goes before
        assert buckets.pick(bucket.num_tokens, bucket.num_rows) == bucket or bucket.num_tokens == bucket.num_rows


def test_steps_shorter_than_the_hosts_work_are_one_program():
    large, small = (Buckets.for_platform("gpu", 256, 8192, num_bytes) for num_bytes in (LARGE, LARGE // 4))
    assert large.whole == (Bucket(8, 8, True),)
    assert [bucket.num_rows for bucket in small.whole] == [8, 16, 24, 32, 48, 64] and set(small.whole) <= set(small)
    assert [bucket.num_rows for bucket in Buckets.for_platform("gpu", 4, 64, LARGE).whole] == [4]


def test_deterministic_steps_have_few_shapes():
    one = Buckets.deterministic(4, (64,))
    assert [*one] == [Bucket(64, 4, False)] and one.logits == (4,)
    assert {one.pick(tokens, rows) for tokens, rows in ((1, 1), (4, 4), (5, 4), (64, 1))} == {Bucket(64, 4, False)}
    several = Buckets.deterministic(256, Buckets.deterministic_sizes(512, 1024))
    assert several.step_sizes == (16, 64, 128, 256, 512, 1024) and several.logits == (64, 256)
    assert several.pick(20, 20) == Bucket(64, 64, False) and several.pick(300, 256) == Bucket(512, 256, False)
    fewer = several.having((512, 64))
    assert fewer.step_sizes == (64, 512) and fewer.logits == several.logits
    assert Buckets.deterministic_sizes(32, 32) == (16, 32) and Buckets.deterministic_sizes(300, 300) == (16, 64, 128, 256, 300)
