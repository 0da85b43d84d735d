"""Step 5, PARTS -> MODEL: the model that is exported, and the task that is trained."""
