"""The command line: `pelton serve`, `chat`, `run`, `pull`, `bench`. One small file a command."""
