def write_table(found, path):
    pass
