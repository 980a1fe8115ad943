"""The only evaluator of the project: features, ranking, whitening and the protocol that turns them into scores."""
