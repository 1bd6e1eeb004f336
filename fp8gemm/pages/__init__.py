"""Self-contained HTML pages: tables, trees, heat maps and plots as inline SVG."""
