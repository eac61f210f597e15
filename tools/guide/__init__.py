"""Builds the guide, the small chat model that ships with Neaptide: data, tokenizer, training, export, evaluation.

    data -> tokenizer -> train -> export -> evaluate        each `python -m tools.guide.<step>`, seeded

Nothing here is imported by the installed package; the result lies in neaptide/models/guide/.
"""
