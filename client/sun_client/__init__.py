URL = "localhost:8001"
"""Where a server's gRPC endpoint is unless told otherwise."""
