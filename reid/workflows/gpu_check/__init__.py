"""Checks in minutes whether results on a GPU are right, and how fast the GPU is.

`sections` lists what is checked. `runner` runs the sections one after the other in a process of
their own (`worker`), so that one that hangs or dies takes no other with it. A section tells what it
sees as it goes on (`findings`); `page` and `docs` write it down. Everything that a section asks of
the rest of the framework goes through `parts`.

The runner imports nothing but Python's own library, and a section imports what it needs, so that a
machine that lacks a package leaves out only the sections that need it.
"""
