"""OpenAI's JSON and SSE: the only package that knows them. peek: what the gateway must read; parse: the replica's
strict reading; chunks: what goes back."""
