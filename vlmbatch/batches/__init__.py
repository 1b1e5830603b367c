"""Batch files of the OpenAI form: what is asked leaves as JSONL, and the answers come back."""
