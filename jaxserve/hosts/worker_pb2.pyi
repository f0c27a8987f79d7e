from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class WorkerMessage(_message.Message):
    __slots__ = ("hello", "proof", "told", "failed", "engine")
    HELLO_FIELD_NUMBER: _ClassVar[int]
    PROOF_FIELD_NUMBER: _ClassVar[int]
    TOLD_FIELD_NUMBER: _ClassVar[int]
    FAILED_FIELD_NUMBER: _ClassVar[int]
    ENGINE_FIELD_NUMBER: _ClassVar[int]
    hello: Hello
    proof: Proof
    told: Told
    failed: Ended
    engine: EngineAddress
    def __init__(self, hello: _Optional[_Union[Hello, _Mapping]] = ..., proof: _Optional[_Union[Proof, _Mapping]] = ..., told: _Optional[_Union[Told, _Mapping]] = ..., failed: _Optional[_Union[Ended, _Mapping]] = ..., engine: _Optional[_Union[EngineAddress, _Mapping]] = ...) -> None: ...

class Hello(_message.Message):
    __slots__ = ("host_index", "num_hosts", "version", "challenge")
    HOST_INDEX_FIELD_NUMBER: _ClassVar[int]
    NUM_HOSTS_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    CHALLENGE_FIELD_NUMBER: _ClassVar[int]
    host_index: int
    num_hosts: int
    version: str
    challenge: bytes
    def __init__(self, host_index: _Optional[int] = ..., num_hosts: _Optional[int] = ..., version: _Optional[str] = ..., challenge: _Optional[bytes] = ...) -> None: ...

class Proof(_message.Message):
    __slots__ = ("digest",)
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    digest: bytes
    def __init__(self, digest: _Optional[bytes] = ...) -> None: ...

class LeaderMessage(_message.Message):
    __slots__ = ("answer", "welcome", "gathered", "file", "call", "ended")
    ANSWER_FIELD_NUMBER: _ClassVar[int]
    WELCOME_FIELD_NUMBER: _ClassVar[int]
    GATHERED_FIELD_NUMBER: _ClassVar[int]
    FILE_FIELD_NUMBER: _ClassVar[int]
    CALL_FIELD_NUMBER: _ClassVar[int]
    ENDED_FIELD_NUMBER: _ClassVar[int]
    answer: Answer
    welcome: Welcome
    gathered: Gathered
    file: File
    call: Call
    ended: Ended
    def __init__(self, answer: _Optional[_Union[Answer, _Mapping]] = ..., welcome: _Optional[_Union[Welcome, _Mapping]] = ..., gathered: _Optional[_Union[Gathered, _Mapping]] = ..., file: _Optional[_Union[File, _Mapping]] = ..., call: _Optional[_Union[Call, _Mapping]] = ..., ended: _Optional[_Union[Ended, _Mapping]] = ...) -> None: ...

class Answer(_message.Message):
    __slots__ = ("challenge", "digest")
    CHALLENGE_FIELD_NUMBER: _ClassVar[int]
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    challenge: bytes
    digest: bytes
    def __init__(self, challenge: _Optional[bytes] = ..., digest: _Optional[bytes] = ...) -> None: ...

class Welcome(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class Told(_message.Message):
    __slots__ = ("topic", "text")
    TOPIC_FIELD_NUMBER: _ClassVar[int]
    TEXT_FIELD_NUMBER: _ClassVar[int]
    topic: str
    text: str
    def __init__(self, topic: _Optional[str] = ..., text: _Optional[str] = ...) -> None: ...

class Gathered(_message.Message):
    __slots__ = ("topic", "texts")
    TOPIC_FIELD_NUMBER: _ClassVar[int]
    TEXTS_FIELD_NUMBER: _ClassVar[int]
    topic: str
    texts: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, topic: _Optional[str] = ..., texts: _Optional[_Iterable[str]] = ...) -> None: ...

class EngineAddress(_message.Message):
    __slots__ = ("replica", "address")
    REPLICA_FIELD_NUMBER: _ClassVar[int]
    ADDRESS_FIELD_NUMBER: _ClassVar[int]
    replica: int
    address: str
    def __init__(self, replica: _Optional[int] = ..., address: _Optional[str] = ...) -> None: ...

class File(_message.Message):
    __slots__ = ("topic", "name", "content")
    TOPIC_FIELD_NUMBER: _ClassVar[int]
    NAME_FIELD_NUMBER: _ClassVar[int]
    CONTENT_FIELD_NUMBER: _ClassVar[int]
    topic: str
    name: str
    content: bytes
    def __init__(self, topic: _Optional[str] = ..., name: _Optional[str] = ..., content: _Optional[bytes] = ...) -> None: ...

class Call(_message.Message):
    __slots__ = ("program", "arrays")
    PROGRAM_FIELD_NUMBER: _ClassVar[int]
    ARRAYS_FIELD_NUMBER: _ClassVar[int]
    program: str
    arrays: _containers.RepeatedCompositeFieldContainer[Array]
    def __init__(self, program: _Optional[str] = ..., arrays: _Optional[_Iterable[_Union[Array, _Mapping]]] = ...) -> None: ...

class Array(_message.Message):
    __slots__ = ("dtype", "shape", "content")
    class Dtype(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
        __slots__ = ()
        INT32: _ClassVar[Array.Dtype]
        UINT32: _ClassVar[Array.Dtype]
    INT32: Array.Dtype
    UINT32: Array.Dtype
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    SHAPE_FIELD_NUMBER: _ClassVar[int]
    CONTENT_FIELD_NUMBER: _ClassVar[int]
    dtype: Array.Dtype
    shape: _containers.RepeatedScalarFieldContainer[int]
    content: bytes
    def __init__(self, dtype: _Optional[_Union[Array.Dtype, str]] = ..., shape: _Optional[_Iterable[int]] = ..., content: _Optional[bytes] = ...) -> None: ...

class Ended(_message.Message):
    __slots__ = ("reason",)
    REASON_FIELD_NUMBER: _ClassVar[int]
    reason: str
    def __init__(self, reason: _Optional[str] = ...) -> None: ...
