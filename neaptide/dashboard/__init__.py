"""The one live page: sign-in, live numbers, decisions, playground. It reads control and decides nothing."""
