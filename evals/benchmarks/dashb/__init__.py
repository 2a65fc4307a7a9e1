"""DASH-B: objects that pictures only suggest."""
