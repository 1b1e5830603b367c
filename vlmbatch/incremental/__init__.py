"""``--incremental``: only the rows that are not answered yet, night after night in one output."""
