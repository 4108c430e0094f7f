"""The engine: which request computes what, in which KV blocks, in each step. Policy over plain data; no torch."""
