"""The tasks that the weights serve: each file is one readable program."""
