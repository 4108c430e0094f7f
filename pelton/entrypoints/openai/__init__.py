"""`python -m pelton.entrypoints.openai.api_server`, in place of vLLM's module of that name."""
