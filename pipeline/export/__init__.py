"""An adapter for use without this project: plain, merged, or as the members of its ensemble."""
