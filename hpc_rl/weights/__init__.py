"""Policy -> rollout weight movement behind one protocol: see `protocol.py`."""
