"""The module names under which people start vLLM."""
