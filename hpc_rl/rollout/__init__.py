"""Generation processes: engines behind one protocol, and the worker loop. Imports nothing heavy itself."""
