"""What holds for every method, on every engine. The numbers of the tests are those of the design's laws."""
