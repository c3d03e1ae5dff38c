"Files that ship with barleria_nb: importable as `barleria_nb._assets`, so that every kind of install finds them."
