"""The gateway benchmark kit: C load generator and mocks, nginx as the other side (README.md)."""
