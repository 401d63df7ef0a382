/* Stand-in, see README. */
#define PAGE_SIZE (1UL << PAGE_SHIFT_)
