"""The kit that any page is made with: layout, figures and thumbnails; it knows no workflow."""
