"""Programs that people run in notebooks, each on a mount over Apache, with the check that the program itself offers.

NBMOUNTD_TEST_LARGE=1 gives the large edition: 2,000 files for git, 10,000 transactions for sqlite, and so on.
"""
