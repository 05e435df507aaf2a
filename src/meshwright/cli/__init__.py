"""The command line: parses, calls the verbs, shows their results on stdout and messages on stderr."""
