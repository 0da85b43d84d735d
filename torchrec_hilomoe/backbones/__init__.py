"""Step 4, SEQUENCE FEATURES -> LOGITS: published models, written without a thought of experts."""
