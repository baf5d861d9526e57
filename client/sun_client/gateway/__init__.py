"""The OpenAI-compatible gateway: HTTP as OpenAI's clients speak it in front, `sun` over gRPC behind it."""
