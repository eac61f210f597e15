"""Answers kept for questions that mean the same: guards, vectors, what may be served. No requests, no clock."""
