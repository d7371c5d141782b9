"""The command line. It may import kdcache's public names and nothing else of it."""
