"""What every other layer speaks in: errors, specs, hashes, the manifest. Standard library only."""
