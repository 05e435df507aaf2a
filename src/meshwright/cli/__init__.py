"""The command line: parses, calls the verbs, shows what they return. stdout is the result, stderr is talk."""
