/* Stand-in, see README: bcc brings a copy of its own and includes that first. */
#include <linux/types.h>
