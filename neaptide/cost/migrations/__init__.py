"""Steps from one schema of the ledger to the next. A step adds; it never drops a table or a column with data in it."""
