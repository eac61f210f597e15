"""TLS: what an operator says of it, contexts from files, a listener that bounds handshakes, a local authority.

Requests and replicas are not known here. `ca.py` alone needs the package cryptography (the extra `tls`).
"""
