"""`moebius doctor`: what is here, what is not, why, and what to do about it.

A doctor has to answer where the patient does not: nothing here needs more than the standard library, and every
framework is imported in a process of its own, which may raise, abort, hang or print what it likes. A `probe` asks and
judges nothing; `packages`, `devices`, `backends` and `settings` judge answers and ask nothing, so that every machine,
broken ones too, can be put to them in a test.
"""
