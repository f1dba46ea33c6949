"""Who may connect, and what they may call: keys, tokens, profiles, policy.

``zap``, ``claims`` and ``policy`` are pure; ``keys``, ``profile`` and ``credentials`` touch files.
Nothing here imports zmq, so the supervisor may use all of it.
"""
