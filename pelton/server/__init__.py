"""The HTTP door: OpenAI's and vLLM's routes over an AsyncLLM. Imports no torch."""
