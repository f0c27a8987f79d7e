from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class FinishReason(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    UNFINISHED: _ClassVar[FinishReason]
    EOS: _ClassVar[FinishReason]
    STOP: _ClassVar[FinishReason]
    LENGTH: _ClassVar[FinishReason]
    ABORT: _ClassVar[FinishReason]
    ERROR: _ClassVar[FinishReason]
    INVALID: _ClassVar[FinishReason]
UNFINISHED: FinishReason
EOS: FinishReason
STOP: FinishReason
LENGTH: FinishReason
ABORT: FinishReason
ERROR: FinishReason
INVALID: FinishReason

class ClientMessage(_message.Message):
    __slots__ = ("generate", "abort", "hello", "proof", "watch_pages")
    GENERATE_FIELD_NUMBER: _ClassVar[int]
    ABORT_FIELD_NUMBER: _ClassVar[int]
    HELLO_FIELD_NUMBER: _ClassVar[int]
    PROOF_FIELD_NUMBER: _ClassVar[int]
    WATCH_PAGES_FIELD_NUMBER: _ClassVar[int]
    generate: Generate
    abort: Abort
    hello: Hello
    proof: Proof
    watch_pages: WatchPages
    def __init__(self, generate: _Optional[_Union[Generate, _Mapping]] = ..., abort: _Optional[_Union[Abort, _Mapping]] = ..., hello: _Optional[_Union[Hello, _Mapping]] = ..., proof: _Optional[_Union[Proof, _Mapping]] = ..., watch_pages: _Optional[_Union[WatchPages, _Mapping]] = ...) -> None: ...

class WatchPages(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class Hello(_message.Message):
    __slots__ = ("challenge",)
    CHALLENGE_FIELD_NUMBER: _ClassVar[int]
    challenge: bytes
    def __init__(self, challenge: _Optional[bytes] = ...) -> None: ...

class Proof(_message.Message):
    __slots__ = ("digest",)
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    digest: bytes
    def __init__(self, digest: _Optional[bytes] = ...) -> None: ...

class Answer(_message.Message):
    __slots__ = ("challenge", "digest")
    CHALLENGE_FIELD_NUMBER: _ClassVar[int]
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    challenge: bytes
    digest: bytes
    def __init__(self, challenge: _Optional[bytes] = ..., digest: _Optional[bytes] = ...) -> None: ...

class Generate(_message.Message):
    __slots__ = ("number", "request_id", "prompt_token_ids", "params", "cache_salt", "adapter")
    NUMBER_FIELD_NUMBER: _ClassVar[int]
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    PROMPT_TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    PARAMS_FIELD_NUMBER: _ClassVar[int]
    CACHE_SALT_FIELD_NUMBER: _ClassVar[int]
    ADAPTER_FIELD_NUMBER: _ClassVar[int]
    number: int
    request_id: str
    prompt_token_ids: _containers.RepeatedScalarFieldContainer[int]
    params: SamplingParams
    cache_salt: str
    adapter: str
    def __init__(self, number: _Optional[int] = ..., request_id: _Optional[str] = ..., prompt_token_ids: _Optional[_Iterable[int]] = ..., params: _Optional[_Union[SamplingParams, _Mapping]] = ..., cache_salt: _Optional[str] = ..., adapter: _Optional[str] = ...) -> None: ...

class Abort(_message.Message):
    __slots__ = ("number", "index")
    NUMBER_FIELD_NUMBER: _ClassVar[int]
    INDEX_FIELD_NUMBER: _ClassVar[int]
    number: int
    index: int
    def __init__(self, number: _Optional[int] = ..., index: _Optional[int] = ...) -> None: ...

class SamplingParams(_message.Message):
    __slots__ = ("n", "temperature", "top_k", "top_p", "min_p", "typical_p", "repetition_penalty", "presence_penalty", "frequency_penalty", "seed", "max_tokens", "min_tokens", "stop_token_ids", "ignore_eos", "logprobs", "logit_bias_token_ids", "logit_bias_values", "grammar", "prompt_logprobs", "watermark_gamma", "watermark_delta")
    N_FIELD_NUMBER: _ClassVar[int]
    TEMPERATURE_FIELD_NUMBER: _ClassVar[int]
    TOP_K_FIELD_NUMBER: _ClassVar[int]
    TOP_P_FIELD_NUMBER: _ClassVar[int]
    MIN_P_FIELD_NUMBER: _ClassVar[int]
    TYPICAL_P_FIELD_NUMBER: _ClassVar[int]
    REPETITION_PENALTY_FIELD_NUMBER: _ClassVar[int]
    PRESENCE_PENALTY_FIELD_NUMBER: _ClassVar[int]
    FREQUENCY_PENALTY_FIELD_NUMBER: _ClassVar[int]
    SEED_FIELD_NUMBER: _ClassVar[int]
    MAX_TOKENS_FIELD_NUMBER: _ClassVar[int]
    MIN_TOKENS_FIELD_NUMBER: _ClassVar[int]
    STOP_TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    IGNORE_EOS_FIELD_NUMBER: _ClassVar[int]
    LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    LOGIT_BIAS_TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    LOGIT_BIAS_VALUES_FIELD_NUMBER: _ClassVar[int]
    GRAMMAR_FIELD_NUMBER: _ClassVar[int]
    PROMPT_LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    WATERMARK_GAMMA_FIELD_NUMBER: _ClassVar[int]
    WATERMARK_DELTA_FIELD_NUMBER: _ClassVar[int]
    n: int
    temperature: float
    top_k: int
    top_p: float
    min_p: float
    typical_p: float
    repetition_penalty: float
    presence_penalty: float
    frequency_penalty: float
    seed: int
    max_tokens: int
    min_tokens: int
    stop_token_ids: _containers.RepeatedScalarFieldContainer[int]
    ignore_eos: bool
    logprobs: int
    logit_bias_token_ids: _containers.RepeatedScalarFieldContainer[int]
    logit_bias_values: _containers.RepeatedScalarFieldContainer[float]
    grammar: Grammar
    prompt_logprobs: int
    watermark_gamma: float
    watermark_delta: float
    def __init__(self, n: _Optional[int] = ..., temperature: _Optional[float] = ..., top_k: _Optional[int] = ..., top_p: _Optional[float] = ..., min_p: _Optional[float] = ..., typical_p: _Optional[float] = ..., repetition_penalty: _Optional[float] = ..., presence_penalty: _Optional[float] = ..., frequency_penalty: _Optional[float] = ..., seed: _Optional[int] = ..., max_tokens: _Optional[int] = ..., min_tokens: _Optional[int] = ..., stop_token_ids: _Optional[_Iterable[int]] = ..., ignore_eos: _Optional[bool] = ..., logprobs: _Optional[int] = ..., logit_bias_token_ids: _Optional[_Iterable[int]] = ..., logit_bias_values: _Optional[_Iterable[float]] = ..., grammar: _Optional[_Union[Grammar, _Mapping]] = ..., prompt_logprobs: _Optional[int] = ..., watermark_gamma: _Optional[float] = ..., watermark_delta: _Optional[float] = ...) -> None: ...

class Grammar(_message.Message):
    __slots__ = ("kind", "text", "param")
    KIND_FIELD_NUMBER: _ClassVar[int]
    TEXT_FIELD_NUMBER: _ClassVar[int]
    PARAM_FIELD_NUMBER: _ClassVar[int]
    kind: str
    text: str
    param: str
    def __init__(self, kind: _Optional[str] = ..., text: _Optional[str] = ..., param: _Optional[str] = ...) -> None: ...

class EngineMessage(_message.Message):
    __slots__ = ("info", "stats", "outputs", "rejections", "answer", "leaving", "page_changes")
    INFO_FIELD_NUMBER: _ClassVar[int]
    STATS_FIELD_NUMBER: _ClassVar[int]
    OUTPUTS_FIELD_NUMBER: _ClassVar[int]
    REJECTIONS_FIELD_NUMBER: _ClassVar[int]
    ANSWER_FIELD_NUMBER: _ClassVar[int]
    LEAVING_FIELD_NUMBER: _ClassVar[int]
    PAGE_CHANGES_FIELD_NUMBER: _ClassVar[int]
    info: EngineInfo
    stats: EngineStats
    outputs: Outputs
    rejections: _containers.RepeatedCompositeFieldContainer[Rejection]
    answer: Answer
    leaving: bool
    page_changes: _containers.RepeatedCompositeFieldContainer[PageChanges]
    def __init__(self, info: _Optional[_Union[EngineInfo, _Mapping]] = ..., stats: _Optional[_Union[EngineStats, _Mapping]] = ..., outputs: _Optional[_Union[Outputs, _Mapping]] = ..., rejections: _Optional[_Iterable[_Union[Rejection, _Mapping]]] = ..., answer: _Optional[_Union[Answer, _Mapping]] = ..., leaving: _Optional[bool] = ..., page_changes: _Optional[_Iterable[_Union[PageChanges, _Mapping]]] = ...) -> None: ...

class PageChanges(_message.Message):
    __slots__ = ("group", "stored", "removed")
    GROUP_FIELD_NUMBER: _ClassVar[int]
    STORED_FIELD_NUMBER: _ClassVar[int]
    REMOVED_FIELD_NUMBER: _ClassVar[int]
    group: int
    stored: _containers.RepeatedScalarFieldContainer[int]
    removed: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, group: _Optional[int] = ..., stored: _Optional[_Iterable[int]] = ..., removed: _Optional[_Iterable[int]] = ...) -> None: ...

class Outputs(_message.Message):
    __slots__ = ("samples", "counts", "token_ids", "notes", "logprobs", "prompt_logprobs")
    SAMPLES_FIELD_NUMBER: _ClassVar[int]
    COUNTS_FIELD_NUMBER: _ClassVar[int]
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    NOTES_FIELD_NUMBER: _ClassVar[int]
    LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    PROMPT_LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    samples: _containers.RepeatedScalarFieldContainer[int]
    counts: _containers.RepeatedScalarFieldContainer[int]
    token_ids: _containers.RepeatedScalarFieldContainer[int]
    notes: _containers.RepeatedCompositeFieldContainer[Note]
    logprobs: Logprobs
    prompt_logprobs: _containers.RepeatedCompositeFieldContainer[PromptLogprobs]
    def __init__(self, samples: _Optional[_Iterable[int]] = ..., counts: _Optional[_Iterable[int]] = ..., token_ids: _Optional[_Iterable[int]] = ..., notes: _Optional[_Iterable[_Union[Note, _Mapping]]] = ..., logprobs: _Optional[_Union[Logprobs, _Mapping]] = ..., prompt_logprobs: _Optional[_Iterable[_Union[PromptLogprobs, _Mapping]]] = ...) -> None: ...

class PromptLogprobs(_message.Message):
    __slots__ = ("position", "raw", "ranks", "top_token_ids", "top_raw", "num_top")
    POSITION_FIELD_NUMBER: _ClassVar[int]
    RAW_FIELD_NUMBER: _ClassVar[int]
    RANKS_FIELD_NUMBER: _ClassVar[int]
    TOP_TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    TOP_RAW_FIELD_NUMBER: _ClassVar[int]
    NUM_TOP_FIELD_NUMBER: _ClassVar[int]
    position: int
    raw: bytes
    ranks: bytes
    top_token_ids: bytes
    top_raw: bytes
    num_top: int
    def __init__(self, position: _Optional[int] = ..., raw: _Optional[bytes] = ..., ranks: _Optional[bytes] = ..., top_token_ids: _Optional[bytes] = ..., top_raw: _Optional[bytes] = ..., num_top: _Optional[int] = ...) -> None: ...

class Note(_message.Message):
    __slots__ = ("position", "finish_reason", "error", "num_cached_tokens", "queue_time")
    POSITION_FIELD_NUMBER: _ClassVar[int]
    FINISH_REASON_FIELD_NUMBER: _ClassVar[int]
    ERROR_FIELD_NUMBER: _ClassVar[int]
    NUM_CACHED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    QUEUE_TIME_FIELD_NUMBER: _ClassVar[int]
    position: int
    finish_reason: FinishReason
    error: str
    num_cached_tokens: int
    queue_time: float
    def __init__(self, position: _Optional[int] = ..., finish_reason: _Optional[_Union[FinishReason, str]] = ..., error: _Optional[str] = ..., num_cached_tokens: _Optional[int] = ..., queue_time: _Optional[float] = ...) -> None: ...

class Logprobs(_message.Message):
    __slots__ = ("positions", "raw", "processed", "top_counts", "top_token_ids", "top_raw", "top_processed")
    POSITIONS_FIELD_NUMBER: _ClassVar[int]
    RAW_FIELD_NUMBER: _ClassVar[int]
    PROCESSED_FIELD_NUMBER: _ClassVar[int]
    TOP_COUNTS_FIELD_NUMBER: _ClassVar[int]
    TOP_TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    TOP_RAW_FIELD_NUMBER: _ClassVar[int]
    TOP_PROCESSED_FIELD_NUMBER: _ClassVar[int]
    positions: _containers.RepeatedScalarFieldContainer[int]
    raw: _containers.RepeatedScalarFieldContainer[float]
    processed: _containers.RepeatedScalarFieldContainer[float]
    top_counts: _containers.RepeatedScalarFieldContainer[int]
    top_token_ids: _containers.RepeatedScalarFieldContainer[int]
    top_raw: _containers.RepeatedScalarFieldContainer[float]
    top_processed: _containers.RepeatedScalarFieldContainer[float]
    def __init__(self, positions: _Optional[_Iterable[int]] = ..., raw: _Optional[_Iterable[float]] = ..., processed: _Optional[_Iterable[float]] = ..., top_counts: _Optional[_Iterable[int]] = ..., top_token_ids: _Optional[_Iterable[int]] = ..., top_raw: _Optional[_Iterable[float]] = ..., top_processed: _Optional[_Iterable[float]] = ...) -> None: ...

class Rejection(_message.Message):
    __slots__ = ("number", "kind", "message", "param", "retry_after")
    class Kind(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
        __slots__ = ()
        UNAVAILABLE: _ClassVar[Rejection.Kind]
        OVERLOADED: _ClassVar[Rejection.Kind]
        INVALID: _ClassVar[Rejection.Kind]
        CONTEXT_TOO_LONG: _ClassVar[Rejection.Kind]
    UNAVAILABLE: Rejection.Kind
    OVERLOADED: Rejection.Kind
    INVALID: Rejection.Kind
    CONTEXT_TOO_LONG: Rejection.Kind
    NUMBER_FIELD_NUMBER: _ClassVar[int]
    KIND_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    PARAM_FIELD_NUMBER: _ClassVar[int]
    RETRY_AFTER_FIELD_NUMBER: _ClassVar[int]
    number: int
    kind: Rejection.Kind
    message: str
    param: str
    retry_after: int
    def __init__(self, number: _Optional[int] = ..., kind: _Optional[_Union[Rejection.Kind, str]] = ..., message: _Optional[str] = ..., param: _Optional[str] = ..., retry_after: _Optional[int] = ...) -> None: ...

class EngineInfo(_message.Message):
    __slots__ = ("model_id", "revision", "model_path", "vocab_size", "max_total_tokens", "max_input_tokens", "eos_token_ids", "page_size", "num_pages", "mesh", "dtype", "device", "defaults", "no_grammars", "deterministic", "kv_cache_dtype", "quantization", "weight_bytes", "windows")
    class DefaultsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: float
        def __init__(self, key: _Optional[str] = ..., value: _Optional[float] = ...) -> None: ...
    MODEL_ID_FIELD_NUMBER: _ClassVar[int]
    REVISION_FIELD_NUMBER: _ClassVar[int]
    MODEL_PATH_FIELD_NUMBER: _ClassVar[int]
    VOCAB_SIZE_FIELD_NUMBER: _ClassVar[int]
    MAX_TOTAL_TOKENS_FIELD_NUMBER: _ClassVar[int]
    MAX_INPUT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    EOS_TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    PAGE_SIZE_FIELD_NUMBER: _ClassVar[int]
    NUM_PAGES_FIELD_NUMBER: _ClassVar[int]
    MESH_FIELD_NUMBER: _ClassVar[int]
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    DEVICE_FIELD_NUMBER: _ClassVar[int]
    DEFAULTS_FIELD_NUMBER: _ClassVar[int]
    NO_GRAMMARS_FIELD_NUMBER: _ClassVar[int]
    DETERMINISTIC_FIELD_NUMBER: _ClassVar[int]
    KV_CACHE_DTYPE_FIELD_NUMBER: _ClassVar[int]
    QUANTIZATION_FIELD_NUMBER: _ClassVar[int]
    WEIGHT_BYTES_FIELD_NUMBER: _ClassVar[int]
    WINDOWS_FIELD_NUMBER: _ClassVar[int]
    model_id: str
    revision: str
    model_path: str
    vocab_size: int
    max_total_tokens: int
    max_input_tokens: int
    eos_token_ids: _containers.RepeatedScalarFieldContainer[int]
    page_size: int
    num_pages: int
    mesh: str
    dtype: str
    device: str
    defaults: _containers.ScalarMap[str, float]
    no_grammars: str
    deterministic: bool
    kv_cache_dtype: str
    quantization: str
    weight_bytes: int
    windows: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, model_id: _Optional[str] = ..., revision: _Optional[str] = ..., model_path: _Optional[str] = ..., vocab_size: _Optional[int] = ..., max_total_tokens: _Optional[int] = ..., max_input_tokens: _Optional[int] = ..., eos_token_ids: _Optional[_Iterable[int]] = ..., page_size: _Optional[int] = ..., num_pages: _Optional[int] = ..., mesh: _Optional[str] = ..., dtype: _Optional[str] = ..., device: _Optional[str] = ..., defaults: _Optional[_Mapping[str, float]] = ..., no_grammars: _Optional[str] = ..., deterministic: _Optional[bool] = ..., kv_cache_dtype: _Optional[str] = ..., quantization: _Optional[str] = ..., weight_bytes: _Optional[int] = ..., windows: _Optional[_Iterable[int]] = ...) -> None: ...

class EngineStats(_message.Message):
    __slots__ = ("num_running", "num_waiting", "num_pages_used", "num_pages", "prefix_queries", "prefix_hits", "num_preemptions", "prompt_tokens", "output_tokens", "num_steps", "padded_tokens", "useful_tokens", "compile_events", "schedule_seconds", "dispatch_seconds", "collect_seconds", "device_seconds", "schedule_counts", "dispatch_counts", "device_counts", "collect_counts")
    NUM_RUNNING_FIELD_NUMBER: _ClassVar[int]
    NUM_WAITING_FIELD_NUMBER: _ClassVar[int]
    NUM_PAGES_USED_FIELD_NUMBER: _ClassVar[int]
    NUM_PAGES_FIELD_NUMBER: _ClassVar[int]
    PREFIX_QUERIES_FIELD_NUMBER: _ClassVar[int]
    PREFIX_HITS_FIELD_NUMBER: _ClassVar[int]
    NUM_PREEMPTIONS_FIELD_NUMBER: _ClassVar[int]
    PROMPT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    OUTPUT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    NUM_STEPS_FIELD_NUMBER: _ClassVar[int]
    PADDED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    USEFUL_TOKENS_FIELD_NUMBER: _ClassVar[int]
    COMPILE_EVENTS_FIELD_NUMBER: _ClassVar[int]
    SCHEDULE_SECONDS_FIELD_NUMBER: _ClassVar[int]
    DISPATCH_SECONDS_FIELD_NUMBER: _ClassVar[int]
    COLLECT_SECONDS_FIELD_NUMBER: _ClassVar[int]
    DEVICE_SECONDS_FIELD_NUMBER: _ClassVar[int]
    SCHEDULE_COUNTS_FIELD_NUMBER: _ClassVar[int]
    DISPATCH_COUNTS_FIELD_NUMBER: _ClassVar[int]
    DEVICE_COUNTS_FIELD_NUMBER: _ClassVar[int]
    COLLECT_COUNTS_FIELD_NUMBER: _ClassVar[int]
    num_running: int
    num_waiting: int
    num_pages_used: int
    num_pages: int
    prefix_queries: int
    prefix_hits: int
    num_preemptions: int
    prompt_tokens: int
    output_tokens: int
    num_steps: int
    padded_tokens: int
    useful_tokens: int
    compile_events: int
    schedule_seconds: float
    dispatch_seconds: float
    collect_seconds: float
    device_seconds: float
    schedule_counts: _containers.RepeatedScalarFieldContainer[int]
    dispatch_counts: _containers.RepeatedScalarFieldContainer[int]
    device_counts: _containers.RepeatedScalarFieldContainer[int]
    collect_counts: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, num_running: _Optional[int] = ..., num_waiting: _Optional[int] = ..., num_pages_used: _Optional[int] = ..., num_pages: _Optional[int] = ..., prefix_queries: _Optional[int] = ..., prefix_hits: _Optional[int] = ..., num_preemptions: _Optional[int] = ..., prompt_tokens: _Optional[int] = ..., output_tokens: _Optional[int] = ..., num_steps: _Optional[int] = ..., padded_tokens: _Optional[int] = ..., useful_tokens: _Optional[int] = ..., compile_events: _Optional[int] = ..., schedule_seconds: _Optional[float] = ..., dispatch_seconds: _Optional[float] = ..., collect_seconds: _Optional[float] = ..., device_seconds: _Optional[float] = ..., schedule_counts: _Optional[_Iterable[int]] = ..., dispatch_counts: _Optional[_Iterable[int]] = ..., device_counts: _Optional[_Iterable[int]] = ..., collect_counts: _Optional[_Iterable[int]] = ...) -> None: ...
