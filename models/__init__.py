"""Networks and their weights; so far the tiny ones that tests of captioning and generation run on."""
