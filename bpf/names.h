/* How bcc wants an fentry or fexit program to be called: by the function and, since 0.29, which is
 * when it got MODULE_KFUNC_PROBE, by where the function is. */
#ifdef MODULE_KFUNC_PROBE
#define ON_FUNCTION(kind, module, function) kind##__##module##__##function
#else
#define ON_FUNCTION(kind, module, function) kind##__##function
#endif
