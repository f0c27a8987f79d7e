"""What crosses from http processes to engine processes: packed token ids over gRPC, on a unix socket or between hosts. No pickle.

`server` runs beside an engine, `client` in an http process; they share the messages of engine.proto and their conversion in `wire`.
"""
