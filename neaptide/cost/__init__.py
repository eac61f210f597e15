"""What a request cost: prices, the meter and the ledger that the journal flows into. Folds over Usage, nothing live."""
