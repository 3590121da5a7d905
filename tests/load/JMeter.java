// Debian 12's JMeter 2.13 can open no plan, not even its own templates: its XStream has since then been made to refuse
// every class that it isn't told of ("ForbiddenClassException"). This tells it of JMeter's own, and starts JMeter:
//
//   java -Djmeter.home=/usr/share/jmeter -cp /usr/share/jmeter/bin/ApacheJMeter.jar:/usr/share/jmeter/lib/*:\
//     /usr/share/jmeter/lib/ext/* tests/load/JMeter.java -n -t tests/load/profiles.jmx …
//
// JMeter from its makers needs none of this.

import com.thoughtworks.xstream.XStream;
import java.lang.reflect.Field;
import org.apache.jmeter.NewDriver;
import org.apache.jmeter.save.SaveService;
import org.apache.jmeter.util.JMeterUtils;

public class JMeter {
  public static void main(String[] arguments) throws ReflectiveOperationException {
    String home = System.getProperty("jmeter.home");
    JMeterUtils.setJMeterHome(home);
    JMeterUtils.loadJMeterProperties(home + "/bin/jmeter.properties");
    for (Field field : SaveService.class.getDeclaredFields()) {
      if (XStream.class.isAssignableFrom(field.getType())) {
        field.setAccessible(true);
        ((XStream) field.get(null)).allowTypesByWildcard(new String[] {"org.apache.jmeter.**", "org.apache.jorphan.**"});
      }
    }
    NewDriver.main(arguments);
  }
}
