"""The command line: options, words and exit codes, nothing else. May import every room; nothing imports it."""
