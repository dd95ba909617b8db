"""What the runtimes without torch share: the operator in C++ (cpp/), its build, networks made ready, files run again."""
