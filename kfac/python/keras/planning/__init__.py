"""What training a model will cost, before anything is trained."""
