/* Stand-in, see README. */
