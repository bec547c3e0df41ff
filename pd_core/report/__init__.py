"""The kit that any page is made with, layout and figures, and each command's template; its code knows no workflow."""
