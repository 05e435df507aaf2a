from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Received(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class RankName(_message.Message):
    __slots__ = ("role", "rank")
    ROLE_FIELD_NUMBER: _ClassVar[int]
    RANK_FIELD_NUMBER: _ClassVar[int]
    role: str
    rank: int
    def __init__(self, role: _Optional[str] = ..., rank: _Optional[int] = ...) -> None: ...

class Node(_message.Message):
    __slots__ = ("name", "address", "interface", "kind", "devices", "cores", "memory_bytes", "link_bytes_per_second")
    NAME_FIELD_NUMBER: _ClassVar[int]
    ADDRESS_FIELD_NUMBER: _ClassVar[int]
    INTERFACE_FIELD_NUMBER: _ClassVar[int]
    KIND_FIELD_NUMBER: _ClassVar[int]
    DEVICES_FIELD_NUMBER: _ClassVar[int]
    CORES_FIELD_NUMBER: _ClassVar[int]
    MEMORY_BYTES_FIELD_NUMBER: _ClassVar[int]
    LINK_BYTES_PER_SECOND_FIELD_NUMBER: _ClassVar[int]
    name: str
    address: str
    interface: str
    kind: str
    devices: int
    cores: int
    memory_bytes: int
    link_bytes_per_second: float
    def __init__(self, name: _Optional[str] = ..., address: _Optional[str] = ..., interface: _Optional[str] = ..., kind: _Optional[str] = ..., devices: _Optional[int] = ..., cores: _Optional[int] = ..., memory_bytes: _Optional[int] = ..., link_bytes_per_second: _Optional[float] = ...) -> None: ...

class Hello(_message.Message):
    __slots__ = ("node", "code_digest", "torch_version", "python_version", "ticket", "generation", "ranks")
    NODE_FIELD_NUMBER: _ClassVar[int]
    CODE_DIGEST_FIELD_NUMBER: _ClassVar[int]
    TORCH_VERSION_FIELD_NUMBER: _ClassVar[int]
    PYTHON_VERSION_FIELD_NUMBER: _ClassVar[int]
    TICKET_FIELD_NUMBER: _ClassVar[int]
    GENERATION_FIELD_NUMBER: _ClassVar[int]
    RANKS_FIELD_NUMBER: _ClassVar[int]
    node: Node
    code_digest: str
    torch_version: str
    python_version: str
    ticket: str
    generation: int
    ranks: _containers.RepeatedCompositeFieldContainer[RankName]
    def __init__(self, node: _Optional[_Union[Node, _Mapping]] = ..., code_digest: _Optional[str] = ..., torch_version: _Optional[str] = ..., python_version: _Optional[str] = ..., ticket: _Optional[str] = ..., generation: _Optional[int] = ..., ranks: _Optional[_Iterable[_Union[RankName, _Mapping]]] = ...) -> None: ...

class RankEnded(_message.Message):
    __slots__ = ("name", "generation", "kind", "message", "result", "error", "seconds_ago", "log_tail")
    NAME_FIELD_NUMBER: _ClassVar[int]
    GENERATION_FIELD_NUMBER: _ClassVar[int]
    KIND_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    RESULT_FIELD_NUMBER: _ClassVar[int]
    ERROR_FIELD_NUMBER: _ClassVar[int]
    SECONDS_AGO_FIELD_NUMBER: _ClassVar[int]
    LOG_TAIL_FIELD_NUMBER: _ClassVar[int]
    name: RankName
    generation: int
    kind: str
    message: str
    result: bytes
    error: bytes
    seconds_ago: float
    log_tail: str
    def __init__(self, name: _Optional[_Union[RankName, _Mapping]] = ..., generation: _Optional[int] = ..., kind: _Optional[str] = ..., message: _Optional[str] = ..., result: _Optional[bytes] = ..., error: _Optional[bytes] = ..., seconds_ago: _Optional[float] = ..., log_tail: _Optional[str] = ...) -> None: ...

class Log(_message.Message):
    __slots__ = ("name", "text", "offset")
    NAME_FIELD_NUMBER: _ClassVar[int]
    TEXT_FIELD_NUMBER: _ClassVar[int]
    OFFSET_FIELD_NUMBER: _ClassVar[int]
    name: RankName
    text: bytes
    offset: int
    def __init__(self, name: _Optional[_Union[RankName, _Mapping]] = ..., text: _Optional[bytes] = ..., offset: _Optional[int] = ...) -> None: ...

class Beat(_message.Message):
    __slots__ = ("number",)
    NUMBER_FIELD_NUMBER: _ClassVar[int]
    number: int
    def __init__(self, number: _Optional[int] = ...) -> None: ...

class AgentMessage(_message.Message):
    __slots__ = ("hello", "beat", "ended", "leaving_seconds", "log", "started")
    HELLO_FIELD_NUMBER: _ClassVar[int]
    BEAT_FIELD_NUMBER: _ClassVar[int]
    ENDED_FIELD_NUMBER: _ClassVar[int]
    LEAVING_SECONDS_FIELD_NUMBER: _ClassVar[int]
    LOG_FIELD_NUMBER: _ClassVar[int]
    STARTED_FIELD_NUMBER: _ClassVar[int]
    hello: Hello
    beat: Beat
    ended: RankEnded
    leaving_seconds: float
    log: Log
    started: Started
    def __init__(self, hello: _Optional[_Union[Hello, _Mapping]] = ..., beat: _Optional[_Union[Beat, _Mapping]] = ..., ended: _Optional[_Union[RankEnded, _Mapping]] = ..., leaving_seconds: _Optional[float] = ..., log: _Optional[_Union[Log, _Mapping]] = ..., started: _Optional[_Union[Started, _Mapping]] = ...) -> None: ...

class Started(_message.Message):
    __slots__ = ("generation", "pids", "sees_run_folder")
    GENERATION_FIELD_NUMBER: _ClassVar[int]
    PIDS_FIELD_NUMBER: _ClassVar[int]
    SEES_RUN_FOLDER_FIELD_NUMBER: _ClassVar[int]
    generation: int
    pids: _containers.RepeatedScalarFieldContainer[int]
    sees_run_folder: bool
    def __init__(self, generation: _Optional[int] = ..., pids: _Optional[_Iterable[int]] = ..., sees_run_folder: bool = ...) -> None: ...

class RankSpec(_message.Message):
    __slots__ = ("name", "local_rank", "world", "device")
    NAME_FIELD_NUMBER: _ClassVar[int]
    LOCAL_RANK_FIELD_NUMBER: _ClassVar[int]
    WORLD_FIELD_NUMBER: _ClassVar[int]
    DEVICE_FIELD_NUMBER: _ClassVar[int]
    name: RankName
    local_rank: int
    world: int
    device: int
    def __init__(self, name: _Optional[_Union[RankName, _Mapping]] = ..., local_rank: _Optional[int] = ..., world: _Optional[int] = ..., device: _Optional[int] = ...) -> None: ...

class RoleSpec(_message.Message):
    __slots__ = ("role", "function", "payload", "environment", "keep_memory", "ranks")
    class EnvironmentEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: str
        def __init__(self, key: _Optional[str] = ..., value: _Optional[str] = ...) -> None: ...
    ROLE_FIELD_NUMBER: _ClassVar[int]
    FUNCTION_FIELD_NUMBER: _ClassVar[int]
    PAYLOAD_FIELD_NUMBER: _ClassVar[int]
    ENVIRONMENT_FIELD_NUMBER: _ClassVar[int]
    KEEP_MEMORY_FIELD_NUMBER: _ClassVar[int]
    RANKS_FIELD_NUMBER: _ClassVar[int]
    role: str
    function: str
    payload: bytes
    environment: _containers.ScalarMap[str, str]
    keep_memory: bool
    ranks: _containers.RepeatedCompositeFieldContainer[RankSpec]
    def __init__(self, role: _Optional[str] = ..., function: _Optional[str] = ..., payload: _Optional[bytes] = ..., environment: _Optional[_Mapping[str, str]] = ..., keep_memory: bool = ..., ranks: _Optional[_Iterable[_Union[RankSpec, _Mapping]]] = ...) -> None: ...

class Start(_message.Message):
    __slots__ = ("generation", "roles", "folder")
    GENERATION_FIELD_NUMBER: _ClassVar[int]
    ROLES_FIELD_NUMBER: _ClassVar[int]
    FOLDER_FIELD_NUMBER: _ClassVar[int]
    generation: int
    roles: _containers.RepeatedCompositeFieldContainer[RoleSpec]
    folder: str
    def __init__(self, generation: _Optional[int] = ..., roles: _Optional[_Iterable[_Union[RoleSpec, _Mapping]]] = ..., folder: _Optional[str] = ...) -> None: ...

class StopRanks(_message.Message):
    __slots__ = ("generation", "role", "grace_seconds")
    GENERATION_FIELD_NUMBER: _ClassVar[int]
    ROLE_FIELD_NUMBER: _ClassVar[int]
    GRACE_SECONDS_FIELD_NUMBER: _ClassVar[int]
    generation: int
    role: str
    grace_seconds: float
    def __init__(self, generation: _Optional[int] = ..., role: _Optional[str] = ..., grace_seconds: _Optional[float] = ...) -> None: ...

class HubMessage(_message.Message):
    __slots__ = ("beat", "start", "stop", "refused", "given_up", "done", "welcome", "secret")
    BEAT_FIELD_NUMBER: _ClassVar[int]
    START_FIELD_NUMBER: _ClassVar[int]
    STOP_FIELD_NUMBER: _ClassVar[int]
    REFUSED_FIELD_NUMBER: _ClassVar[int]
    GIVEN_UP_FIELD_NUMBER: _ClassVar[int]
    DONE_FIELD_NUMBER: _ClassVar[int]
    WELCOME_FIELD_NUMBER: _ClassVar[int]
    SECRET_FIELD_NUMBER: _ClassVar[int]
    beat: Beat
    start: Start
    stop: StopRanks
    refused: str
    given_up: str
    done: Received
    welcome: Welcome
    secret: str
    def __init__(self, beat: _Optional[_Union[Beat, _Mapping]] = ..., start: _Optional[_Union[Start, _Mapping]] = ..., stop: _Optional[_Union[StopRanks, _Mapping]] = ..., refused: _Optional[str] = ..., given_up: _Optional[str] = ..., done: _Optional[_Union[Received, _Mapping]] = ..., welcome: _Optional[_Union[Welcome, _Mapping]] = ..., secret: _Optional[str] = ...) -> None: ...

class Welcome(_message.Message):
    __slots__ = ("folder_mark", "folder_mark_path", "patience_seconds")
    FOLDER_MARK_FIELD_NUMBER: _ClassVar[int]
    FOLDER_MARK_PATH_FIELD_NUMBER: _ClassVar[int]
    PATIENCE_SECONDS_FIELD_NUMBER: _ClassVar[int]
    folder_mark: str
    folder_mark_path: str
    patience_seconds: float
    def __init__(self, folder_mark: _Optional[str] = ..., folder_mark_path: _Optional[str] = ..., patience_seconds: _Optional[float] = ...) -> None: ...

class KeyRequest(_message.Message):
    __slots__ = ("operation", "keys", "value", "expected", "amount", "wait_seconds", "id")
    class Operation(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
        __slots__ = ()
        SET: _ClassVar[KeyRequest.Operation]
        GET: _ClassVar[KeyRequest.Operation]
        ADD: _ClassVar[KeyRequest.Operation]
        COMPARE: _ClassVar[KeyRequest.Operation]
        WAIT: _ClassVar[KeyRequest.Operation]
        CHECK: _ClassVar[KeyRequest.Operation]
        DELETE: _ClassVar[KeyRequest.Operation]
        COUNT: _ClassVar[KeyRequest.Operation]
    SET: KeyRequest.Operation
    GET: KeyRequest.Operation
    ADD: KeyRequest.Operation
    COMPARE: KeyRequest.Operation
    WAIT: KeyRequest.Operation
    CHECK: KeyRequest.Operation
    DELETE: KeyRequest.Operation
    COUNT: KeyRequest.Operation
    OPERATION_FIELD_NUMBER: _ClassVar[int]
    KEYS_FIELD_NUMBER: _ClassVar[int]
    VALUE_FIELD_NUMBER: _ClassVar[int]
    EXPECTED_FIELD_NUMBER: _ClassVar[int]
    AMOUNT_FIELD_NUMBER: _ClassVar[int]
    WAIT_SECONDS_FIELD_NUMBER: _ClassVar[int]
    ID_FIELD_NUMBER: _ClassVar[int]
    operation: KeyRequest.Operation
    keys: _containers.RepeatedScalarFieldContainer[str]
    value: bytes
    expected: bytes
    amount: int
    wait_seconds: float
    id: int
    def __init__(self, operation: _Optional[_Union[KeyRequest.Operation, str]] = ..., keys: _Optional[_Iterable[str]] = ..., value: _Optional[bytes] = ..., expected: _Optional[bytes] = ..., amount: _Optional[int] = ..., wait_seconds: _Optional[float] = ..., id: _Optional[int] = ...) -> None: ...

class KeyReply(_message.Message):
    __slots__ = ("found", "value", "number")
    FOUND_FIELD_NUMBER: _ClassVar[int]
    VALUE_FIELD_NUMBER: _ClassVar[int]
    NUMBER_FIELD_NUMBER: _ClassVar[int]
    found: bool
    value: bytes
    number: int
    def __init__(self, found: bool = ..., value: _Optional[bytes] = ..., number: _Optional[int] = ...) -> None: ...

class Told(_message.Message):
    __slots__ = ("name", "kind", "body", "blob", "number")
    NAME_FIELD_NUMBER: _ClassVar[int]
    KIND_FIELD_NUMBER: _ClassVar[int]
    BODY_FIELD_NUMBER: _ClassVar[int]
    BLOB_FIELD_NUMBER: _ClassVar[int]
    NUMBER_FIELD_NUMBER: _ClassVar[int]
    name: RankName
    kind: str
    body: bytes
    blob: bytes
    number: int
    def __init__(self, name: _Optional[_Union[RankName, _Mapping]] = ..., kind: _Optional[str] = ..., body: _Optional[bytes] = ..., blob: _Optional[bytes] = ..., number: _Optional[int] = ...) -> None: ...

class CallsRequest(_message.Message):
    __slots__ = ("name", "after")
    NAME_FIELD_NUMBER: _ClassVar[int]
    AFTER_FIELD_NUMBER: _ClassVar[int]
    name: RankName
    after: int
    def __init__(self, name: _Optional[_Union[RankName, _Mapping]] = ..., after: _Optional[int] = ...) -> None: ...

class ToldTogether(_message.Message):
    __slots__ = ("told",)
    TOLD_FIELD_NUMBER: _ClassVar[int]
    told: _containers.RepeatedCompositeFieldContainer[Told]
    def __init__(self, told: _Optional[_Iterable[_Union[Told, _Mapping]]] = ...) -> None: ...

class Call(_message.Message):
    __slots__ = ("id", "name", "body", "blob")
    ID_FIELD_NUMBER: _ClassVar[int]
    NAME_FIELD_NUMBER: _ClassVar[int]
    BODY_FIELD_NUMBER: _ClassVar[int]
    BLOB_FIELD_NUMBER: _ClassVar[int]
    id: int
    name: str
    body: bytes
    blob: bytes
    def __init__(self, id: _Optional[int] = ..., name: _Optional[str] = ..., body: _Optional[bytes] = ..., blob: _Optional[bytes] = ...) -> None: ...

class CallAnswer(_message.Message):
    __slots__ = ("name", "id", "body", "blob", "error")
    NAME_FIELD_NUMBER: _ClassVar[int]
    ID_FIELD_NUMBER: _ClassVar[int]
    BODY_FIELD_NUMBER: _ClassVar[int]
    BLOB_FIELD_NUMBER: _ClassVar[int]
    ERROR_FIELD_NUMBER: _ClassVar[int]
    name: RankName
    id: int
    body: bytes
    blob: bytes
    error: str
    def __init__(self, name: _Optional[_Union[RankName, _Mapping]] = ..., id: _Optional[int] = ..., body: _Optional[bytes] = ..., blob: _Optional[bytes] = ..., error: _Optional[str] = ...) -> None: ...

class ReadRequest(_message.Message):
    __slots__ = ("operation", "path", "offset", "count")
    class Operation(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
        __slots__ = ()
        ENTRY: _ClassVar[ReadRequest.Operation]
        ENTRIES: _ClassVar[ReadRequest.Operation]
        CONTENT: _ClassVar[ReadRequest.Operation]
    ENTRY: ReadRequest.Operation
    ENTRIES: ReadRequest.Operation
    CONTENT: ReadRequest.Operation
    OPERATION_FIELD_NUMBER: _ClassVar[int]
    PATH_FIELD_NUMBER: _ClassVar[int]
    OFFSET_FIELD_NUMBER: _ClassVar[int]
    COUNT_FIELD_NUMBER: _ClassVar[int]
    operation: ReadRequest.Operation
    path: str
    offset: int
    count: int
    def __init__(self, operation: _Optional[_Union[ReadRequest.Operation, str]] = ..., path: _Optional[str] = ..., offset: _Optional[int] = ..., count: _Optional[int] = ...) -> None: ...

class Entry(_message.Message):
    __slots__ = ("name", "is_folder", "bytes", "changed_ns")
    NAME_FIELD_NUMBER: _ClassVar[int]
    IS_FOLDER_FIELD_NUMBER: _ClassVar[int]
    BYTES_FIELD_NUMBER: _ClassVar[int]
    CHANGED_NS_FIELD_NUMBER: _ClassVar[int]
    name: str
    is_folder: bool
    bytes: int
    changed_ns: int
    def __init__(self, name: _Optional[str] = ..., is_folder: bool = ..., bytes: _Optional[int] = ..., changed_ns: _Optional[int] = ...) -> None: ...

class ReadReply(_message.Message):
    __slots__ = ("entries", "content", "fault")
    ENTRIES_FIELD_NUMBER: _ClassVar[int]
    CONTENT_FIELD_NUMBER: _ClassVar[int]
    FAULT_FIELD_NUMBER: _ClassVar[int]
    entries: _containers.RepeatedCompositeFieldContainer[Entry]
    content: bytes
    fault: Fault
    def __init__(self, entries: _Optional[_Iterable[_Union[Entry, _Mapping]]] = ..., content: _Optional[bytes] = ..., fault: _Optional[_Union[Fault, _Mapping]] = ...) -> None: ...

class Fault(_message.Message):
    __slots__ = ("errno", "error")
    ERRNO_FIELD_NUMBER: _ClassVar[int]
    ERROR_FIELD_NUMBER: _ClassVar[int]
    errno: int
    error: bytes
    def __init__(self, errno: _Optional[int] = ..., error: _Optional[bytes] = ...) -> None: ...

class FilePiece(_message.Message):
    __slots__ = ("offset", "data")
    OFFSET_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    offset: int
    data: bytes
    def __init__(self, offset: _Optional[int] = ..., data: _Optional[bytes] = ...) -> None: ...

class WriteRequest(_message.Message):
    __slots__ = ("operation", "path", "target", "pieces", "size_bytes", "durable", "id")
    class Operation(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
        __slots__ = ()
        WRITE: _ClassVar[WriteRequest.Operation]
        RESIZE: _ClassVar[WriteRequest.Operation]
        WRITE_AT: _ClassVar[WriteRequest.Operation]
        MAKE_FOLDER: _ClassVar[WriteRequest.Operation]
        RENAME: _ClassVar[WriteRequest.Operation]
        REMOVE: _ClassVar[WriteRequest.Operation]
        SYNC: _ClassVar[WriteRequest.Operation]
    WRITE: WriteRequest.Operation
    RESIZE: WriteRequest.Operation
    WRITE_AT: WriteRequest.Operation
    MAKE_FOLDER: WriteRequest.Operation
    RENAME: WriteRequest.Operation
    REMOVE: WriteRequest.Operation
    SYNC: WriteRequest.Operation
    OPERATION_FIELD_NUMBER: _ClassVar[int]
    PATH_FIELD_NUMBER: _ClassVar[int]
    TARGET_FIELD_NUMBER: _ClassVar[int]
    PIECES_FIELD_NUMBER: _ClassVar[int]
    SIZE_BYTES_FIELD_NUMBER: _ClassVar[int]
    DURABLE_FIELD_NUMBER: _ClassVar[int]
    ID_FIELD_NUMBER: _ClassVar[int]
    operation: WriteRequest.Operation
    path: str
    target: str
    pieces: _containers.RepeatedCompositeFieldContainer[FilePiece]
    size_bytes: int
    durable: bool
    id: int
    def __init__(self, operation: _Optional[_Union[WriteRequest.Operation, str]] = ..., path: _Optional[str] = ..., target: _Optional[str] = ..., pieces: _Optional[_Iterable[_Union[FilePiece, _Mapping]]] = ..., size_bytes: _Optional[int] = ..., durable: bool = ..., id: _Optional[int] = ...) -> None: ...

class WriteReply(_message.Message):
    __slots__ = ("fault",)
    FAULT_FIELD_NUMBER: _ClassVar[int]
    fault: Fault
    def __init__(self, fault: _Optional[_Union[Fault, _Mapping]] = ...) -> None: ...

class StatusRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class RankStatus(_message.Message):
    __slots__ = ("name", "node", "state")
    NAME_FIELD_NUMBER: _ClassVar[int]
    NODE_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    name: RankName
    node: str
    state: str
    def __init__(self, name: _Optional[_Union[RankName, _Mapping]] = ..., node: _Optional[str] = ..., state: _Optional[str] = ...) -> None: ...

class StatusReply(_message.Message):
    __slots__ = ("generation", "nodes", "ranks", "failures", "seconds")
    GENERATION_FIELD_NUMBER: _ClassVar[int]
    NODES_FIELD_NUMBER: _ClassVar[int]
    RANKS_FIELD_NUMBER: _ClassVar[int]
    FAILURES_FIELD_NUMBER: _ClassVar[int]
    SECONDS_FIELD_NUMBER: _ClassVar[int]
    generation: int
    nodes: _containers.RepeatedCompositeFieldContainer[Node]
    ranks: _containers.RepeatedCompositeFieldContainer[RankStatus]
    failures: _containers.RepeatedScalarFieldContainer[str]
    seconds: float
    def __init__(self, generation: _Optional[int] = ..., nodes: _Optional[_Iterable[_Union[Node, _Mapping]]] = ..., ranks: _Optional[_Iterable[_Union[RankStatus, _Mapping]]] = ..., failures: _Optional[_Iterable[str]] = ..., seconds: _Optional[float] = ...) -> None: ...

class StopRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...
