"""What a private step costs beside a plain one: engines, configurations, measuring (``make bench-dp``)."""
