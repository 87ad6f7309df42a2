// A target needs a source file, even if there is only its precompiled header to be made.
